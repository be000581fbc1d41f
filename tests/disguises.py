"""Reads that write, in every notation, and reads that do not: data only, for the servers to judge.

`SCHEMA` makes probes whose effects `EFFECTS` counts. Each text of `DISGUISED` looks like a read to somebody and leaves an
effect; each of `HONEST` leaves none and calls only what PostgreSQL marks stable or immutable.
"""

from __future__ import annotations

SCHEMA = """
CREATE SCHEMA elsewhere;
CREATE SEQUENCE numbers;
CREATE TABLE journal (t text);
CREATE TABLE users (id int, name text, tags text[]);
INSERT INTO users VALUES (1, 'a', '{a,b}');
CREATE FUNCTION write(t text) RETURNS int LANGUAGE sql AS $$ INSERT INTO journal VALUES (t) RETURNING 1 $$;
CREATE FUNCTION tell(t text) RETURNS int LANGUAGE sql AS $$ SELECT 1 FROM pg_notify('effects', clock_timestamp()::text) $$;
CREATE FUNCTION audit(n int) RETURNS int LANGUAGE sql AS $$ SELECT write(n::text) $$;
CREATE FUNCTION audit(n bigint) RETURNS int LANGUAGE sql AS $$ SELECT tell(n::text) $$;
CREATE FUNCTION log(msg text) RETURNS void LANGUAGE sql AS $$ SELECT tell(msg) $$;
CREATE FUNCTION age(text) RETURNS int LANGUAGE sql AS $$ SELECT tell($1) $$;
CREATE FUNCTION rollup(n int) RETURNS int LANGUAGE sql AS $$ SELECT tell(n::text) $$;
CREATE FUNCTION touch(users) RETURNS int LANGUAGE sql AS $$ SELECT tell('touch') $$;
CREATE FUNCTION "Tell Me"(int) RETURNS int LANGUAGE sql AS $$ SELECT tell('quoted') $$;
CREATE FUNCTION elsewhere.hidden(int) RETURNS int LANGUAGE sql AS $$ SELECT tell('hidden') $$;
CREATE FUNCTION größe(int) RETURNS int LANGUAGE sql AS $$ SELECT tell('umlaut') $$;
CREATE FUNCTION a_function_whose_name_is_exactly_as_long_as_postgresql_allows63(int) RETURNS int
    LANGUAGE sql AS $$ SELECT tell('long') $$;
CREATE FUNCTION chk(int) RETURNS bool LANGUAGE sql AS $$ SELECT tell('check') > 0 $$;
CREATE DOMAIN positive AS int CHECK (chk(value));
CREATE DOMAIN more_positive AS positive;
CREATE TYPE rec AS (a positive);
CREATE TYPE span AS RANGE (subtype = positive);
CREATE FUNCTION wants(positive) RETURNS int LANGUAGE sql IMMUTABLE AS $$ SELECT 1 $$;
CREATE FUNCTION by_default(a int DEFAULT tell('default')) RETURNS int LANGUAGE sql IMMUTABLE AS $$ SELECT $1 $$;
CREATE FUNCTION plus3(int, int) RETURNS int LANGUAGE sql AS $$ SELECT tell('operator') $$;
CREATE OPERATOR @+@ (LEFTARG = int, RIGHTARG = int, FUNCTION = plus3);
CREATE OPERATOR elsewhere.<-> (LEFTARG = int, RIGHTARG = int, FUNCTION = plus3);
CREATE TYPE wrapped AS (x int);
CREATE FUNCTION to_wrapped(int) RETURNS wrapped LANGUAGE sql AS $$ SELECT ROW(tell('cast'))::wrapped $$;
CREATE CAST (int AS wrapped) WITH FUNCTION to_wrapped(int);
CREATE FUNCTION unwrap(wrapped) RETURNS int LANGUAGE sql IMMUTABLE AS $$ SELECT 1 $$;
CREATE FUNCTION step(int, int) RETURNS int LANGUAGE sql AS $$ SELECT tell('aggregate') $$;
CREATE AGGREGATE total (int) (SFUNC = step, STYPE = int, INITCOND = '0');
CREATE FUNCTION inverse(int, int) RETURNS int LANGUAGE sql IMMUTABLE AS $$ SELECT $1 - $2 $$;
CREATE FUNCTION differs(int, int) RETURNS bool LANGUAGE plpgsql AS $$ BEGIN PERFORM tell('negator'); RETURN true; END $$;
CREATE OPERATOR ===! (LEFTARG = int, RIGHTARG = int, FUNCTION = int4eq, NEGATOR = <##>);
CREATE OPERATOR <##> (LEFTARG = int, RIGHTARG = int, FUNCTION = differs, NEGATOR = ===!);
CREATE FUNCTION less(int, int) RETURNS bool LANGUAGE plpgsql AS $$ BEGIN PERFORM public.tell('commutator'); RETURN $1 < $2; END $$;
CREATE OPERATOR >># (LEFTARG = int, RIGHTARG = int, FUNCTION = int4gt, COMMUTATOR = <<#);
CREATE OPERATOR <<# (LEFTARG = int, RIGHTARG = int, FUNCTION = less, COMMUTATOR = >>#);
CREATE OPERATOR CLASS commuted FOR TYPE int USING btree AS OPERATOR 1 <<#, OPERATOR 5 >>#, FUNCTION 1 btint4cmp(int, int);
CREATE FUNCTION compares(int, int) RETURNS int LANGUAGE plpgsql AS $$ BEGIN PERFORM public.tell('support'); RETURN btint4cmp($1, $2); END $$;
CREATE OPERATOR CLASS supported FOR TYPE int USING btree AS OPERATOR 1 pg_catalog.<, OPERATOR 2 pg_catalog.<=,
    OPERATOR 3 pg_catalog.=, OPERATOR 4 pg_catalog.>=, OPERATOR 5 pg_catalog.>, FUNCTION 1 compares(int, int);
CREATE TABLE ordered (x int) WITH (autovacuum_enabled = false);
INSERT INTO ordered SELECT generate_series(1, 2000);
CREATE INDEX ON ordered (x supported);
CREATE TABLE commuting (x int) WITH (autovacuum_enabled = false);
INSERT INTO commuting SELECT generate_series(1, 2000);
CREATE INDEX ON commuting (x commuted);
ANALYZE ordered, commuting;
CREATE TYPE telling_span AS RANGE (subtype = int, subtype_opclass = supported);
CREATE FUNCTION hashes(int, int8) RETURNS int8 LANGUAGE plpgsql AS $$ BEGIN PERFORM public.tell('hash'); RETURN $1 + $2; END $$;
CREATE OPERATOR CLASS hashed FOR TYPE int USING hash AS OPERATOR 1 pg_catalog.=, FUNCTION 2 hashes(int, int8);
CREATE TABLE hash_parted (a int) PARTITION BY HASH (a hashed);
CREATE TABLE hash_parted_0 PARTITION OF hash_parted FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE hash_parted_1 PARTITION OF hash_parted FOR VALUES WITH (MODULUS 2, REMAINDER 1);
CREATE TYPE pair AS (a int, b int);
CREATE FUNCTION pair_less(pair, pair) RETURNS bool LANGUAGE sql IMMUTABLE AS $$ SELECT $1.a < $2.a $$;
CREATE FUNCTION pair_same(pair, pair) RETURNS bool LANGUAGE plpgsql AS $$ BEGIN PERFORM tell('same'); RETURN true; END $$;
CREATE FUNCTION pair_order(pair, pair) RETURNS int LANGUAGE sql IMMUTABLE AS $$ SELECT btint4cmp($1.a, $2.a) $$;
CREATE OPERATOR <<%< (LEFTARG = pair, RIGHTARG = pair, FUNCTION = pair_less);
CREATE OPERATOR =%=% (LEFTARG = pair, RIGHTARG = pair, FUNCTION = pair_same);
CREATE OPERATOR <> (LEFTARG = pair, RIGHTARG = pair, FUNCTION = pair_same);
CREATE OPERATOR CLASS pairs DEFAULT FOR TYPE pair USING btree
    AS OPERATOR 1 <<%<, OPERATOR 3 =%=%, FUNCTION 1 pair_order(pair, pair);
CREATE TABLE paired (p pair, ps pair[]);
INSERT INTO paired VALUES ((1, 2), '{"(1,2)"}'), ((1, 3), '{"(1,2)"}');
CREATE VIEW negating AS SELECT NOT (x ===! 5) AS a FROM generate_series(1, 1) AS x;
CREATE VIEW telling AS SELECT tell('view') AS a;
CREATE VIEW over_telling AS SELECT * FROM telling;
CREATE VIEW notifying AS SELECT pg_notify('effects', clock_timestamp()::text)::text AS a;
CREATE VIEW locking AS SELECT pg_advisory_lock(77)::text AS a;
CREATE VIEW configuring AS SELECT set_config('application_name', clock_timestamp()::text, false) AS a;
CREATE VIEW counting AS SELECT x FROM generate_series(1, 2) AS x WHERE x @+@ 1 > 0;
CREATE VIEW checking AS SELECT x::positive AS a FROM generate_series(1, 2) AS x;
CREATE VIEW sequenced AS SELECT nextval('numbers') AS a;
CREATE TABLE guarded (x int);
INSERT INTO guarded VALUES (1);
ALTER TABLE guarded ENABLE ROW LEVEL SECURITY;
ALTER TABLE guarded FORCE ROW LEVEL SECURITY;
CREATE POLICY p ON guarded USING (tell('policy') > 0);
GRANT SELECT ON ALL TABLES IN SCHEMA public TO PUBLIC;
CREATE FUNCTION steady(n int) RETURNS int LANGUAGE sql STABLE AS $$ SELECT count(*)::int + n FROM users $$;
CREATE FUNCTION fixed(n int) RETURNS int LANGUAGE sql IMMUTABLE AS $$ SELECT n + 1 $$;
CREATE AGGREGATE steady_total (int) (SFUNC = pg_catalog.int4pl, STYPE = int, INITCOND = '0');
CREATE DOMAIN small AS int CHECK (value < 100);
CREATE VIEW plain AS SELECT id, name, fixed(id) AS f, count(*) OVER (), now() FROM users WHERE name LIKE 'a%';
CREATE VIEW over_plain AS SELECT * FROM plain JOIN users USING (id, name) ORDER BY name;
CREATE TABLE parted (a int, b text) PARTITION BY LIST (a);
CREATE TABLE parted_1 PARTITION OF parted FOR VALUES IN (1);
CREATE FUNCTION on_change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$;
CREATE TRIGGER t BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION on_change();
CREATE TABLE on_change (on_change int);
CREATE TYPE spot AS (x int);
CREATE FUNCTION spot_less(spot, spot) RETURNS bool LANGUAGE sql IMMUTABLE AS $$ SELECT $1.x < $2.x $$;
CREATE FUNCTION spot_order(spot, spot) RETURNS int LANGUAGE sql IMMUTABLE AS $$ SELECT btint4cmp($1.x, $2.x) $$;
CREATE FUNCTION spot_same(spot, spot) RETURNS bool LANGUAGE sql IMMUTABLE AS $$ SELECT $1.x = $2.x $$;
CREATE OPERATOR < (LEFTARG = spot, RIGHTARG = spot, FUNCTION = spot_less);
CREATE OPERATOR = (LEFTARG = spot, RIGHTARG = spot, FUNCTION = spot_same);
CREATE OPERATOR CLASS spots DEFAULT FOR TYPE spot USING btree AS OPERATOR 1 <, OPERATOR 3 =, FUNCTION 1 spot_order(spot, spot);
CREATE TYPE mood AS ENUM ('fine');
CREATE TABLE spotted (s spot, ss spot[], m mood, ms mood[], d small, r int4range);
INSERT INTO spotted VALUES (ROW(1), '{"(1)"}', 'fine', '{fine}', 1, '[1,2)');
CREATE MATERIALIZED VIEW kept AS SELECT tell('once') AS a;
"""

DISGUISED = (
    # PostgreSQL's own, by any notation
    "SELECT TREAT('numbers' AS nextval)",
    "SELECT TREAT(1 AS pg_advisory_lock)",
    "SELECT TREAT(0 AS lo_create)",
    "SELECT x.nextval FROM regclass('numbers'::text) AS x",
    "SELECT g.pg_advisory_lock FROM generate_series(1, 3) g",
    "SELECT s.nextval FROM unnest(ARRAY['numbers'::regclass]) s",
    "SELECT j.lo_create FROM oid(0::int8) j",
    "SELECT x.nextval FROM CAST('numbers' AS regclass) AS x",
    "SELECT x.nextval FROM ROWS FROM (to_regclass('numbers')) x",
    "SELECT 1 FROM users u JOIN users w ON (ARRAY[1,2])[1] = 1 AND w.id OPERATOR(pg_catalog.<>) nextval('numbers')",
    "SELECT 1 IS DISTINCT FROM b OPERATOR(pg_catalog.+) nextval('numbers') FROM (SELECT 1 AS b) t",
    # The user's, by any notation
    "SELECT audit(1)",
    "SELECT s.audit FROM generate_series(1, 3) s",
    "SELECT s.audit FROM generate_series(1, 3::bigint) s",
    "SELECT 1 FROM generate_series(1, 3) s WHERE s.audit > 0",
    "SELECT generate_series.audit FROM generate_series(1, 3)",
    "SELECT a IS DISTINCT FROM (b OPERATOR(pg_catalog.+) audit(7)) FROM (SELECT 1 AS a, 1 AS b) t",
    "SELECT 1 FROM (SELECT 1 AS a) t JOIN (SELECT 2 AS b) u ON ARRAY[1,2] = ARRAY[1,2] AND b OPERATOR(pg_catalog.<>) audit(8)",
    "SELECT u.id FROM users u ORDER BY u.id IS DISTINCT FROM u.id OPERATOR(pg_catalog.+) audit(9)",
    "SELECT 1 GROUP BY ARRAY[1, rollup(1)]",
    "SELECT log('x')",
    "SELECT age('x'::text)",
    "SELECT u.touch FROM users u",
    "TABLE users ORDER BY users.touch",
    "SELECT (u).touch FROM users u",
    'SELECT "Tell Me"(1)',
    "SELECT elsewhere.hidden(1)",
    'SELECT "elsewhere"."hidden"(1)',
    "SELECT größe(1)",
    "SELECT a_function_whose_name_is_exactly_as_long_as_postgresql_allows63_and_more(1)",
    "SELECT by_default()",
    "SELECT wants(1)",
    "SELECT * FROM users, LATERAL audit(users.id) AS x",
    # Operators, casts, types, aggregates
    "SELECT 5 @+@ 6",
    "SELECT 5 OPERATOR(public.@+@) 6",
    "SELECT 5 OPERATOR(elsewhere.<->) 6",
    "SELECT 5 @+@ @ -6",
    "SELECT 5::positive",
    "SELECT CAST(5 AS positive)",
    "SELECT positive '5'",
    "SELECT 5::more_positive",
    "SELECT '{5}'::positive[]",
    "SELECT '{5}'::_positive",
    "SELECT '[5,6)'::span",
    "SELECT ROW(5)::rec",
    "SELECT json_populate_record(NULL::rec, '{\"a\": 5}')",
    "SELECT * FROM json_to_record('{\"a\": 5}') AS t(a positive)",
    "SELECT 5::wrapped",
    "SELECT unwrap(5::wrapped)",
    "SELECT total(id) FROM users",
    "SELECT total(id) OVER () FROM users",
    # What no text names: negators, commutators, operator classes
    "SELECT NOT (x ===! 5) FROM generate_series(1, 1) AS x",
    "SELECT x FROM commuting WHERE 3 >># x",
    "SELECT x FROM ordered WHERE x = 77",
    "SELECT array_agg('[1,5)'::telling_span) FROM generate_series(1, 2)",
    "SELECT * FROM hash_parted WHERE a = 5",
    "SELECT satisfies_hash_partition('hash_parted'::regclass, 2, 0, 5)",
    "SELECT DISTINCT p FROM paired",
    "SELECT count(*) FROM paired GROUP BY p",
    "SELECT p FROM paired UNION SELECT p FROM paired",
    "SELECT ps FROM paired GROUP BY ps",
    "SELECT ps = ps FROM paired",
    "SELECT * FROM negating",
    # A type whose name is in a string
    "SELECT domain_in('5', 'positive'::regtype, -1) IS NULL",
    "SELECT array_in('{5}', 'positive'::regtype, -1)::text",
    "SELECT record_in('(5)', 'rec'::regtype, -1)::text",
    "SELECT range_in('[5,6)', 'span'::regtype, -1)::text",
    "SELECT multirange_in('{[5,6)}', 'span_multirange'::regtype, -1)::text",
    # Views and policies
    "SELECT * FROM telling",
    "TABLE over_telling",
    "SELECT * FROM notifying",
    "SELECT * FROM locking",
    "SELECT * FROM configuring",
    "SELECT * FROM counting",
    "SELECT * FROM checking",
    "SELECT * FROM sequenced",
    "SELECT EXISTS (SELECT FROM public.telling)",
)

HONEST = (
    "SELECT 1",
    "SELECT steady(fixed(1))",
    "SELECT u.id, u.name, u.tags[1] FROM users u ORDER BY u.name",
    "SELECT s.fixed FROM generate_series(1, 3) s",
    "SELECT steady_total(id), max(name), count(*) FROM users WHERE id IN (1, 2) AND name LIKE 'a%'",
    "SELECT 5::small, small '7'",
    "SELECT * FROM plain",
    "SELECT * FROM over_plain",
    "SELECT * FROM parted",
    "SELECT x.key, x.value FROM json_each('{}') AS x",
    "SELECT on_change FROM on_change",
    "SELECT * FROM kept",
    "SELECT DISTINCT s, ss, m, ms, d, r FROM spotted ORDER BY s, m",
    "SELECT * FROM spotted WHERE s = s AND m = 'fine' AND ss = ss AND ms = ms AND NOT d = 2 AND r @> 1",
    "SELECT random(), clock_timestamp(), gen_random_uuid(), pg_sleep(0), pg_relation_size('users')",
    "SELECT * FROM pg_stat_activity JOIN pg_locks USING (pid)",
    "SELECT * FROM information_schema.tables JOIN information_schema.columns USING (table_name) LIMIT 3",
    "SELECT id FROM users TABLESAMPLE SYSTEM (50)",
    "SHOW search_path",
    "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 3) SELECT t.n FROM t",
)

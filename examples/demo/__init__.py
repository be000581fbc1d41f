"""The demo: one application on two pools, side by side, while its database is mistreated."""

"""The demo: one application on two pools, side by side, while faults are injected between it and its database."""

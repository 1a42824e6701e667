"""The rooms of tools/build_icons.py: fetch -> sources -> captions, filters -> rasterise -> masters -> bake -> write."""

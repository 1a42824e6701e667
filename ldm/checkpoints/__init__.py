"""Files <-> models. native.py is our own format; no other is read in this version."""

"""Is the picture of a prompt nearest to its own concept? A classifier of the icons' concepts is the judge."""

"""SHARD -> BATCH: tar files of captioned pictures (or of cached latents) become equal batches on every process."""

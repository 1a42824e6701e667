"""Small files that change a model: low-rank changes of its weights (LoRA), new words for its text tower."""

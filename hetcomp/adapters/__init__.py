"""LoRA adapters: PEFT folders as low-rank pairs of the traced model's weights, their merging and their export."""

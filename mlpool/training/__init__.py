"""Fine-tuning an embedder: training pairs, losses, the trainer."""

"""TinyBERT on tasks: GLUE and tasks on tokens, augmentation, search, the demo."""

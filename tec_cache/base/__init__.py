"""The making side's model: a pretrained ViT, frozen, that says what the student shall learn."""

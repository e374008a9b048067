"""How a pretrained model is fine-tuned: which weights are trained, how they are added, and what is saved of them."""

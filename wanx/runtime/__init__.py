"""What turns a bundle into video, with neither PyTorch nor model code."""

"""Out of jaxmem: folders and state dicts that PyTorch, transformers and PEFT load, each with the proof that they do."""

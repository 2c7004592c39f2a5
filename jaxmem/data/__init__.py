"""Records to messages, messages to batches: chat templates, images, token and patch positions."""

"""Training: pure steps (`sft`), the run around them (`loop`), and `run.train(config)`, which joins everything."""

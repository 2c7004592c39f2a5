"""Self-synthesis (arXiv 2505.17670, section 3.3): a model's own right answers, behind items, become training data."""

"""What goes on inside a model, and the reports that show it."""

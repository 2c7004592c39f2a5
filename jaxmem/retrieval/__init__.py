"""Knowledge outside the weights: banks of encoded items, indexes that find them, and what fills both."""

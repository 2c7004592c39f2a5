"""What a run will need and how fast it can be, known before a machine is rented."""

"""`jaxmem bench NAME`: speed, measured side by side in one run. Figures are printed, never asserted."""

"""Counts that sites add up, and the metrics of the pooled predictions that follow from them."""

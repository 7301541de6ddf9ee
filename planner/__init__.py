"""What decides: workload and budget in, an attention that fits out."""

"""What belongs to the caller (model, process, ranks, batches, files): taken as it is, left as it was."""

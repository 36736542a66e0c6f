"""Turn one record into one training example: token ids with loss weights."""

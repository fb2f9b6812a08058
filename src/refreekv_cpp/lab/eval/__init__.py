"""What a pruned cache costs in answer quality: `refreekv eval`."""

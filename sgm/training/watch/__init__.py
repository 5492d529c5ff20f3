"""What a run says of itself: log, boards, curve, seconds by phase."""

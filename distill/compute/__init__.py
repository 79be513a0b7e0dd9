"""What computing rests on: devices, several processes, random numbers, low-rank adapters, what a call costs."""

"""What is done to engines while they serve: sleep and wake, and the load of LoRA adapters."""

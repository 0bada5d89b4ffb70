"""What is compared: plain LoRA, full fine-tuning, their rivals, and re-basing."""

"""What VoRA is compared with."""

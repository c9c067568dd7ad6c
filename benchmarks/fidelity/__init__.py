"""What few views and lossy targets cost in what the student learns."""

"""What people see: the pages in a real Chromium, driven as a visitor would."""

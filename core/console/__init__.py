"""What a user is told and asks for: reports, event files, keys, requests to stop."""

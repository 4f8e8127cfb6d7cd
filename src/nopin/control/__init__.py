"""What client, server and peer say to each other outside the data path: typed, bounded messages."""

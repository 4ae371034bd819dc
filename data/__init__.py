"""Token shards: their format (`shards`), and the commands that download, tokenise or make them."""

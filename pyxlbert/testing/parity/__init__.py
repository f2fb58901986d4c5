"""`pyxlbert parity`: every op and model that can run here against float64, beside plain PyTorch."""

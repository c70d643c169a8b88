"""The logs of TensorBoard, W&B and Hugging Face's Trainer as rows of named cells, without packages of theirs."""

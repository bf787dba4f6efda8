"""What travels: JSON types, protobuf messages, and the packed bytes that wait in the queue.

`packing` and `losses` need numpy only, so that engine, training and sampling import without the server packages.
"""

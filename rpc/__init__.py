"""The only home of grpc and msgpack: codecs, server and client shells, deadlines."""

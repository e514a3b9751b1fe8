module git.omukk.dev/wrenn/sandbox

go 1.26.0

require (
	connectrpc.com/connect v1.21.1
	github.com/klauspost/compress v1.20.3
	github.com/pierrec/lz4/v4 v4.1.33
	golang.org/x/sys v0.49.0
	google.golang.org/protobuf v1.36.12
)

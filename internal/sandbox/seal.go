package sandbox

import (
	"bytes"

	"git.omukk.dev/wrenn/sandbox/internal/sealed"
)

// unseal checks the checksum of a line or a record, if there is one: objects of earlier
// agents have none. The checksum is not of the line's end.
func unseal(data []byte) ([]byte, error) {
	if !sealed.Has(data) {
		return data, nil
	}
	return sealed.Unseal(bytes.TrimSuffix(data, []byte("\n")))
}

package sandbox

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"strconv"
)

// A JSON object on disk begins with a checksum of all that follows it, so that
// no flipped bit makes it say something else:
//
//	{"sum":"9ae0daaf","version":1}
const (
	sealBegin = `{"sum":"`
	sealLen   = len(sealBegin) + 8 + len(`",`)
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// seal puts the checksum into an object that has at least one field.
func seal(object []byte) []byte {
	rest := object[1:]
	return append(fmt.Appendf(nil, "%s%08x\",", sealBegin, crc32.Checksum(rest, castagnoli)), rest...)
}

// sealed says whether data begins as what seal returns.
func sealed(data []byte) bool { return bytes.HasPrefix(data, []byte(sealBegin)) && len(data) > sealLen }

// unseal checks the checksum, if there is one: objects of earlier agents have
// none.
func unseal(data []byte) ([]byte, error) {
	if !sealed(data) {
		return data, nil
	}
	rest := bytes.TrimSuffix(data[sealLen:], []byte("\n"))
	sum, err := strconv.ParseUint(string(data[len(sealBegin):len(sealBegin)+8]), 16, 32)
	if err != nil || uint32(sum) != crc32.Checksum(rest, castagnoli) {
		return nil, errors.New("its checksum does not match")
	}
	return append([]byte("{"), rest...), nil
}

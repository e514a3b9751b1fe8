package gvisor

import (
	"bytes"
	"encoding/binary"
)

// probeSign is what the probe guest prints.
const probeSign = "wrenn-probe-ok\n"

// says is an x86-64 program that prints a text and ends.
func says(text string) []byte {
	var code []byte
	code = append(code, call64(1, 1, 0, uint32(len(text)))...)  // write(1, text, its length)
	code = append(code, call64(231, 0, 0, 0)...)                // exit_group(0)
	binary.LittleEndian.PutUint32(code[11:], textAt(len(code))) // the address of the text
	return elf(append(code, text...))
}

const (
	// callBytes is the length of a system call's code.
	callBytes = 22
	headers   = 64 + 56
	base      = 0x400000
)

// textAt is the address of what follows code of n bytes.
func textAt(n int) uint32 { return base + headers + uint32(n) }

// call64 is the code of a system call.
func call64(number, a, b, c uint32) []byte {
	var code bytes.Buffer
	for _, set := range []struct {
		register byte
		value    uint32
	}{{0xb8, number}, {0xbf, a}, {0xbe, b}, {0xba, c}} { // mov eax, edi, esi, edx
		code.WriteByte(set.register)
		_ = binary.Write(&code, binary.LittleEndian, set.value)
	}
	code.Write([]byte{0x0f, 0x05}) // syscall
	return code.Bytes()
}

// elf makes an executable of code, which is loaded at base with its headers.
func elf(code []byte) []byte {
	size := uint64(headers + len(code))
	var out bytes.Buffer
	out.Write([]byte{0x7f, 'E', 'L', 'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	for _, field := range []any{
		uint16(2), uint16(62), uint32(1), // an executable for x86-64
		uint64(base + headers), uint64(64), uint64(0), // entry, program headers, no sections
		uint32(0), uint16(64), uint16(56), uint16(1), uint16(0), uint16(0), uint16(0),
		uint32(1), uint32(5), uint64(0), uint64(base), uint64(base), size, size, uint64(4096), // load, read and execute
	} {
		_ = binary.Write(&out, binary.LittleEndian, field)
	}
	out.Write(code)
	return out.Bytes()
}

// The parts of an EROFS image that image uses.
const (
	blockBytes = 4096
	superAt    = 1024
	inodeBytes = 32
	rootNode   = 36 // its inode follows the superblock, in the same block
	initNode   = rootNode + 1
)

// image is a file system, EROFS, with one program: /init. It has the three blocks of the
// superblock and the inodes, of the root directory, and those of the program.
func image(program []byte) []byte {
	blocks := 2 + (len(program)+blockBytes-1)/blockBytes
	out := make([]byte, blocks*blockBytes)
	le := binary.LittleEndian
	super := out[superAt:]
	le.PutUint32(super[0:], 0xe0f5e1e2)
	super[12] = 12 // the logarithm of a block's size
	le.PutUint16(super[14:], rootNode)
	le.PutUint64(super[16:], 2) // inodes
	le.PutUint32(super[36:], uint32(blocks))

	names := []struct {
		name string
		node uint64
		kind byte
	}{{".", rootNode, 2}, {"..", rootNode, 2}, {"init", initNode, 1}}
	dir, at := out[blockBytes:], 12*len(names)
	for i, n := range names {
		entry := dir[12*i:]
		le.PutUint64(entry, n.node)
		le.PutUint16(entry[8:], uint16(at))
		entry[10] = n.kind
		at += copy(dir[at:], n.name)
	}
	inode := func(node int, mode uint16, links uint16, size, block uint32) {
		p := out[node*inodeBytes:]
		le.PutUint16(p[4:], mode)
		le.PutUint16(p[6:], links)
		le.PutUint32(p[8:], size)
		le.PutUint32(p[16:], block)
		le.PutUint32(p[20:], uint32(node))
	}
	inode(rootNode, 0o040755, 2, uint32(at), 1)
	inode(initNode, 0o100755, 1, uint32(len(program)), 2)
	copy(out[2*blockBytes:], program)
	return out
}

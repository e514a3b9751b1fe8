// Command hello is the only program of an image: it prints where it runs and what it was
// told.
package main

import (
	"fmt"
	"os"
)

func main() {
	dir, _ := os.Getwd()
	fmt.Println("hello from", dir, "with", os.Getenv("COLOUR"), os.Args[1:])
}

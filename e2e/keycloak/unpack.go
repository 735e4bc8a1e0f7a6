// Command keycloak unpacks the distribution of Keycloak: the directory in the zip that is
// its first argument becomes the new directory that is its third.
//
// A test that is compiled for the race detector would take twenty times as long.
package main

import (
	"archive/zip"
	"fmt"
	"io/fs"
	"os"
)

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: keycloak <zip> <directory in it> <new directory>")
		os.Exit(2)
	}
	if err := unpack(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func unpack(file, part, dir string) error {
	archive, err := zip.OpenReader(file)
	if err != nil {
		return err
	}
	defer archive.Close()
	content, err := fs.Sub(archive, part)
	if err != nil {
		return err
	}
	return os.CopyFS(dir, content)
}

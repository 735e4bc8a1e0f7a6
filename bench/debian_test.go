package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestInstalled(t *testing.T) {
	dir := t.TempDir()
	present, missing := filepath.Join(dir, "*.so"), filepath.Join(dir, "missing.so")
	if err := os.WriteFile(filepath.Join(dir, "module.so"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := installed("the packages", present); err != nil {
		t.Error(err)
	}
	err := installed("the packages", present, missing)
	if err == nil || !strings.Contains(err.Error(), missing) || !strings.HasSuffix(err.Error(), " the packages") {
		t.Errorf("got %v, want an error that says what is missing, and how to install it", err)
	}
}

package main

import (
	"maps"
	"testing"
)

func TestLabels(t *testing.T) {
	for _, c := range []struct {
		flags []string
		want  map[string]string
	}{
		{nil, nil},
		{[]string{"a=1", "b", "c=", "d=x=y"}, map[string]string{"a": "1", "b": "", "c": "", "d": "x=y"}},
		{[]string{"a=1", "a=2"}, map[string]string{"a": "2"}},
	} {
		if got, err := labelsOf(c.flags); err != nil || !maps.Equal(got, c.want) {
			t.Errorf("%q: %v, %v", c.flags, got, err)
		}
	}
	got, err := wantedLabels([]string{"label=a=1", "label=b=", "label=c=x=y", "label=a=1"})
	if want := map[string]string{"a": "1", "b": "", "c": "x=y"}; err != nil || !maps.Equal(got, want) {
		t.Errorf("filters: %v, %v", got, err)
	}
}

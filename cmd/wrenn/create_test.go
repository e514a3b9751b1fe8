package main

import (
	"maps"
	"testing"
	"time"
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

func TestEndAt(t *testing.T) {
	now := time.Now()
	for text, want := range map[string]time.Time{
		"": {}, "never": {}, "0s": now, "2h": now.Add(2 * time.Hour),
		"2030-01-31T12:00:00+01:00": time.Date(2030, 1, 31, 11, 0, 0, 0, time.UTC),
	} {
		got, err := endAt(text)
		if err != nil || got.IsZero() != want.IsZero() || got.Sub(want).Abs() > time.Minute {
			t.Errorf("%q: %s, %v", text, got, err)
		}
	}
}

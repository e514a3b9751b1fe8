package e2b_test

import (
	"encoding/json"
	"testing"
	"time"

	"git.omukk.dev/wrenn/sandbox/api/e2b"
)

func TestTimestampHasMilliseconds(t *testing.T) {
	whole := time.Date(2026, 11, 27, 10, 0, 0, 0, time.FixedZone("", 3600))
	for at, want := range map[time.Time]string{
		whole:                                  `"2026-11-27T09:00:00.000Z"`,
		whole.Add(1_999_999 * time.Nanosecond): `"2026-11-27T09:00:00.001Z"`,
	} {
		got, err := json.Marshal(e2b.At(at))
		if err != nil || string(got) != want {
			t.Errorf("got %s, %v, want %s", got, err, want)
		}
		var back e2b.Timestamp
		if err := json.Unmarshal(got, &back); err != nil || !back.Equal(at.Truncate(time.Millisecond)) {
			t.Errorf("%s is read as %v, %v", got, back, err)
		}
	}
}

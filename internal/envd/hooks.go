package envd

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"time"

	processv1 "git.omukk.dev/wrenn/sandbox/api/process"
)

const (
	// hookDir has programs that run each time the guest goes on from a snapshot.
	hookDir = "/etc/wrenn/on-resume.d"
	// generationFile names the present time that it did, in a guest with that directory.
	generationFile = "/run/wrenn/generation"
	// generationVariable has the same in the environment of the programs.
	generationVariable = "WRENN_GENERATION"
	// maxHooks and hookTimeout bound what these programs take.
	maxHooks    = 64
	hookTimeout = time.Minute
)

// newGeneration names what begins when a guest goes on from a snapshot, before its
// programs do. The host may say so several times, with the same entropy or, when it sets
// the clock again, with none: only the first time has a name. Without hooks none has.
// Called with initMu held.
func (s *Server) newGeneration(entropy []byte) (string, error) {
	if len(entropy) == 0 {
		return "", nil
	}
	sum := sha256.Sum256(append([]byte(generationVariable), entropy...))
	generation := hex.EncodeToString(sum[:16])
	if generation == s.generation || !dirExists(hookDir) {
		return "", nil
	}
	s.generation = generation
	return generation, replaceFile(generationFile, generation+"\n")
}

// runHooks starts the programs of a new generation, one after the other in the order of
// their names, as root. It waits for them, each for hookTimeout.
func (s *Server) runHooks(dir, generation string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		s.log.Warn("read hooks", "err", err)
	}
	for _, e := range entries[:min(len(entries), maxHooks)] {
		path := filepath.Join(dir, e.Name())
		info, err := os.Stat(path)
		if err != nil || !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
			continue
		}
		if err := s.runHook(path, generation); err != nil {
			s.log.Warn("hook", "path", path, "err", err)
		}
	}
}

func (s *Server) runHook(path, generation string) error {
	as, err := s.account("root")
	if err != nil {
		return err
	}
	env := s.environment(as)
	maps.Copy(env, s.userEnv())
	env[generationVariable] = generation
	p, sub, err := s.processes.start(command{
		config: &processv1.ProcessConfig{Cmd: path}, as: as, cwd: "/", env: env, limit: hookTimeout, gentle: true,
	})
	if err != nil {
		return err
	}
	sub.close() // its output goes nowhere
	<-p.finished
	switch {
	case p.overran.Load():
		return errors.New("it ran for longer than " + hookTimeout.String())
	case p.ending.GetExitCode() != 0:
		return errors.New(p.ending.GetStatus())
	}
	return nil
}

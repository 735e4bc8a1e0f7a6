package deploy

import (
	"errors"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	kjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// objects are what a file asks Kubernetes for.
type objects struct {
	configMaps      map[string]*corev1.ConfigMap
	serviceAccounts map[string]*corev1.ServiceAccount
	deployments     []*appsv1.Deployment
	services        []*corev1.Service
	policies        []*networkingv1.NetworkPolicy
}

// readObjects decodes a file as strictly as the API server does with
// `kubectl apply --validate=strict`.
func readObjects(t *testing.T, content string) objects {
	t.Helper()
	o := objects{configMaps: make(map[string]*corev1.ConfigMap), serviceAccounts: make(map[string]*corev1.ServiceAccount)}
	for document := range strings.SplitSeq(content, "\n---\n") {
		document += "\n" // which belongs to it, in a block of text for example
		decode := func(into any) {
			if err := decodeStrictly(document, into); err != nil {
				t.Fatalf("%v in\n%s", err, document)
			}
		}
		var meta metav1.PartialObjectMetadata
		if err := yaml.Unmarshal([]byte(document), &meta); err != nil {
			t.Fatal(err)
		}
		if meta.Name == "" {
			t.Errorf("got an object without a name, want one in\n%s", document)
		}
		switch kind := meta.APIVersion + " " + meta.Kind; kind {
		case "v1 ConfigMap":
			o.configMaps[meta.Name] = new(corev1.ConfigMap)
			decode(o.configMaps[meta.Name])
		case "v1 ServiceAccount":
			o.serviceAccounts[meta.Name] = new(corev1.ServiceAccount)
			decode(o.serviceAccounts[meta.Name])
		case "apps/v1 Deployment":
			o.deployments = append(o.deployments, new(appsv1.Deployment))
			decode(o.deployments[len(o.deployments)-1])
		case "v1 Service":
			o.services = append(o.services, new(corev1.Service))
			decode(o.services[len(o.services)-1])
		case "networking.k8s.io/v1 NetworkPolicy":
			o.policies = append(o.policies, new(networkingv1.NetworkPolicy))
			decode(o.policies[len(o.policies)-1])
		default:
			t.Fatalf("got %s, want a kind that this test knows", kind)
		}
	}
	return o
}

// decodeStrictly refuses fields that the type doesn't have, or not in this
// spelling, and those that are there twice.
func decodeStrictly(document string, into any) error {
	asJSON, err := yaml.YAMLToJSONStrict([]byte(document))
	if err != nil {
		return err
	}
	strict, err := kjson.UnmarshalStrict(asJSON, into)
	return errors.Join(append(strict, err)...)
}

// kubernetesFiles are the examples, and what the client of each sends to prove
// who it is: the content of the one file below its secrets.
var kubernetesFiles = []struct {
	file string
	sent func(*http.Request) string
}{
	{"caddy.yaml", func(r *http.Request) string { _, secret, _ := r.BasicAuth(); return secret }},
	{"workload-identity.yaml", func(r *http.Request) string { return r.Form.Get("client_assertion") }},
}

func TestKubernetesObjectsFitTogether(t *testing.T) {
	for _, test := range kubernetesFiles {
		t.Run(test.file, func(t *testing.T) {
			o := readObjects(t, readFile(t, "../../examples/kubernetes/"+test.file))
			if len(o.deployments) != 1 {
				t.Fatalf("got %d Deployments, want 1", len(o.deployments))
			}
			d := o.deployments[0]
			pod := d.Spec.Template
			if !selects(d.Spec.Selector.MatchLabels, pod.Labels) {
				t.Errorf("got labels %v of the pods, want what the Deployment selects", pod.Labels)
			}
			if name := pod.Spec.ServiceAccountName; name != "" && o.serviceAccounts[name] == nil {
				t.Errorf("got no ServiceAccount %s, want it", name)
			}
			c := pod.Spec.Containers[0]

			// The file is for a cluster that has the other one's Service already.
			for _, s := range o.services {
				if !selects(s.Spec.Selector, pod.Labels) {
					t.Errorf("got labels %v of the pods, want what the Service selects", pod.Labels)
				}
				checkPort(t, c, s.Spec.Ports[0].TargetPort)
			}
			for _, p := range o.policies {
				if !selects(p.Spec.PodSelector.MatchLabels, pod.Labels) {
					t.Errorf("got labels %v of the pods, want what the NetworkPolicy selects", pod.Labels)
				}
				checkPort(t, c, *p.Spec.Ingress[0].Ports[0].Port)
			}
			checkPort(t, c, c.ReadinessProbe.HTTPGet.Port)

			if got, want := slices.Sorted(maps.Keys(mounts(c))), volumes(pod.Spec); !slices.Equal(got, want) {
				t.Errorf("got mounts of %v, want %v", got, want)
			}
		})
	}
}

// TestKubernetesPodsAreConfined checks that the pods may do nothing that the
// image has no need for, and that the image can live with that.
func TestKubernetesPodsAreConfined(t *testing.T) {
	dockerfile := readFile(t, "../../Dockerfile")
	user := regexp.MustCompile(`(?m)^USER (\d+):\d+$`).FindStringSubmatch(dockerfile)
	dirs := regexp.MustCompile(`(?m)^ENV XDG_DATA_HOME=(\S+) XDG_CONFIG_HOME=(\S+)$`).FindStringSubmatch(dockerfile)
	if user == nil || dirs == nil {
		t.Fatal("got a Dockerfile without USER or without ENV XDG_DATA_HOME, want both")
	}
	for _, test := range kubernetesFiles {
		t.Run(test.file, func(t *testing.T) {
			pod := readObjects(t, readFile(t, "../../examples/kubernetes/"+test.file)).deployments[0].Spec.Template.Spec
			if token := pod.AutomountServiceAccountToken; token == nil || *token {
				t.Error("got the token for the Kubernetes API in the pods, want none")
			}
			p := pod.SecurityContext
			if !*p.RunAsNonRoot || p.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
				t.Errorf("got %+v, want no root, and the runtime's seccomp profile", p)
			}
			if got := strconv.FormatInt(*p.RunAsUser, 10); got != user[1] {
				t.Errorf("got user %s, want that of the image, %s", got, user[1])
			}
			c := pod.Containers[0]
			s := c.SecurityContext
			if *s.AllowPrivilegeEscalation || !*s.ReadOnlyRootFilesystem || !slices.Equal(s.Capabilities.Drop, []corev1.Capability{"ALL"}) {
				t.Errorf("got %+v, want no privilege", s)
			}

			// Where Caddy writes, the pods can write.
			writable := make(map[string]bool)
			for _, v := range pod.Volumes {
				if v.EmptyDir != nil {
					writable[mounts(c)[v.Name].MountPath] = true
				}
			}
			if !maps.Equal(writable, map[string]bool{dirs[1]: true, dirs[2]: true}) {
				t.Errorf("got writable %v, want %v", writable, dirs[1:])
			}
		})
	}
}

func TestKubernetesCaddyfilesWork(t *testing.T) {
	for _, test := range kubernetesFiles {
		t.Run(test.file, func(t *testing.T) {
			content := readFile(t, "../../examples/kubernetes/"+test.file)
			o := readObjects(t, content)
			pod := o.deployments[0].Spec.Template.Spec
			c := pod.Containers[0]
			var caddyfile, secrets string // the secrets' directory
			for _, v := range pod.Volumes {
				mount := mounts(c)[v.Name]
				switch {
				case v.ConfigMap != nil:
					// Where the image looks for it.
					if mount.MountPath != "/etc/caddy" {
						t.Errorf("got the ConfigMap at %s, want it at /etc/caddy", mount.MountPath)
					}
					configMap := o.configMaps[v.ConfigMap.Name]
					if configMap == nil {
						t.Fatalf("got no ConfigMap %s, want it", v.ConfigMap.Name)
					}
					caddyfile = configMap.Data["Caddyfile"]
				case v.Secret != nil, v.Projected != nil:
					secrets = mount.MountPath
					if !mount.ReadOnly || mount.SubPath != "" {
						t.Errorf("got %+v, want it read-only, and a directory, which is kept up to date", mount)
					}
				}
			}
			checkCaddyfile(t, caddyfile)

			// The file that the Caddyfile names is the one that the volume has.
			dir := t.TempDir()
			name := secretName(t, pod, content)
			jwt := "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJzeXN0ZW06c2VydmljZWFjY291bnQifQ.c2lnbmF0dXJl"
			writeFile(t, filepath.Join(dir, name), jwt+"\n")
			caddyfile = replace(t, caddyfile, secrets+"/"+name, filepath.Join(dir, name))
			if got := test.sent(tokenRequest(t, caddyfile)); got != jwt {
				t.Errorf("got %q sent to the authorization server, want %q", got, jwt)
			}

			// There is nothing behind this gateway, and it is ready all the same.
			gateway := "http://127.0.0.1:" + heldPort(t)
			caddyfile = replace(t, caddyfile, ":8080 {", gateway+" {\n\tbind 127.0.0.1")
			caddyfile = replace(t, caddyfile, "shutdown_delay 5s", "admin off")
			caddyfile = replace(t, caddyfile, "https://auth.example.com", "http://127.0.0.1:"+heldPort(t))
			cmd := exec.Command(caddyBinary, "run", "--config", writeFile(t, filepath.Join(t.TempDir(), "Caddyfile"), caddyfile))
			cmd.Env = append(os.Environ(), "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
			caddy := start(t, cmd)
			for path, want := range map[string]int{
				c.ReadinessProbe.HTTPGet.Path: http.StatusOK,
				"/orders":                     http.StatusServiceUnavailable,
			} {
				if status, _ := caddy.get(t, http.DefaultClient, gateway+path); status != want {
					t.Errorf("got status %d from %s, want %d", status, path, want)
				}
			}
			if port := strconv.Itoa(int(c.Ports[0].ContainerPort)); port != "8080" {
				t.Errorf("got port %s of the container, want 8080 as in the Caddyfile", port)
			}
		})
	}
}

// secretName returns the name of the one file in the pod's volume of secrets.
func secretName(t *testing.T, pod corev1.PodSpec, content string) string {
	t.Helper()
	for _, v := range pod.Volumes {
		switch {
		case v.Projected != nil:
			return v.Projected.Sources[0].ServiceAccountToken.Path
		case v.Secret != nil:
			// The Secret is made by a command, since it has no place in a file.
			command := regexp.MustCompile(`kubectl create secret generic ` + v.Secret.SecretName + ` --from-file=(\w+)=`)
			match := command.FindStringSubmatch(content)
			if match == nil {
				t.Fatalf("got no command that creates the Secret %s, want it", v.Secret.SecretName)
			}
			return match[1]
		}
	}
	t.Fatal("got no volume with secrets, want one")
	return ""
}

func TestKubernetesMistakesShow(t *testing.T) {
	for document, mistake := range map[string]bool{
		"spec:\n  replicas: 2\n":                false,
		"spec:\n  replica: 2\n":                 true,
		"spec:\n  Replicas: 2\n":                true,
		"spec:\n  replicas: two\n":              true,
		"spec:\n  replicas: 1\n  replicas: 2\n": true,
	} {
		if err := decodeStrictly(document, new(appsv1.Deployment)); (err != nil) != mistake {
			t.Errorf("got %v from\n%s\nwant an error: %t", err, document, mistake)
		}
	}
}

// selects tells whether a selector matches labels.
func selects(selector, labels map[string]string) bool {
	for name, value := range selector {
		if labels[name] != value {
			return false
		}
	}
	return len(selector) > 0
}

func checkPort(t *testing.T, c corev1.Container, port intstr.IntOrString) {
	t.Helper()
	for _, p := range c.Ports {
		if port.StrVal == p.Name || port.IntVal == p.ContainerPort {
			return
		}
	}
	t.Errorf("got port %v, want one of the container's, %v", &port, c.Ports)
}

// mounts returns where each volume is mounted.
func mounts(c corev1.Container) map[string]corev1.VolumeMount {
	byName := make(map[string]corev1.VolumeMount)
	for _, m := range c.VolumeMounts {
		byName[m.Name] = m
	}
	return byName
}

func volumes(pod corev1.PodSpec) []string {
	var names []string
	for _, v := range pod.Volumes {
		names = append(names, v.Name)
	}
	slices.Sort(names)
	return names
}

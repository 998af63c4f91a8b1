module ambient-mesh-cni

go 1.22

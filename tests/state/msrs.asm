# msrs: known values in the MSRs that a system would set up; exits with 3 + the place of a wrong one in the table
#@ entry real16
start:
    mov si, table
put:
    mov ecx, dword ptr [si]
    mov eax, dword ptr [si + 4]
    mov edx, dword ptr [si + 8]
    wrmsr
    add si, 12
    cmp si, table_end
    jne put
    call be_moved
    mov si, table
    mov bl, 3
look:
    mov ecx, dword ptr [si]
    rdmsr
    cmp eax, dword ptr [si + 4]
    jne wrong_msr
    cmp edx, dword ptr [si + 8]
    jne wrong_msr
    inc bl
    add si, 12
    cmp si, table_end
    jne look
    jmp passed
wrong_msr:
    mov al, bl
    out EXIT, al

table:
    .long 0x174, 0x1230, 0              # SYSENTER_CS
    .long 0x175, 0x12345678, 0x00007f00 # SYSENTER_ESP
    .long 0x176, 0x23456789, 0x00007f01 # SYSENTER_EIP
    .long 0xc0000081, 0, 0x00230010     # STAR
    .long 0xc0000082, 0x3456789a, 0x00007f02 # LSTAR
    .long 0xc0000083, 0x456789ab, 0x00007f03 # CSTAR
    .long 0xc0000084, 0x47700, 0        # SFMASK
    .long 0xc0000102, 0x56789abc, 0x00007f04 # KERNEL_GS_BASE
    .long 0x277, 0x00070106, 0x00070106 # PAT
    .long 0x1a0, 0, 0                   # MISC_ENABLE: fast strings are on by default
    .long 0x3b, 0x789a, 0               # TSC_ADJUST
    .long 0x4b564d01, 0xa001, 0         # KVM_SYSTEM_TIME_NEW: where kvmclock's page is
table_end:

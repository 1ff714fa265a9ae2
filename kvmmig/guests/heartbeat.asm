; heartbeat: tells, by a clock that goes on while it stands still, how long it stood still
;@ entry real16
;@ param threshold = 10     milliseconds: a shorter gap between two looks at the clock is not told
;
; It looks at the clock all the time. Where two looks are further apart than the threshold it prints
;
;   blackout 23.4 ms
;
; which is what it saw of a pause, a migration's downtime, or a host that gave it no CPU. It prints a dot each second.
;
; The clock is the host's own time of day, as KVM tells it: MSR_KVM_WALL_CLOCK_NEW makes KVM write when the guest was
; booted, and the page of MSR_KVM_SYSTEM_TIME_NEW how long ago that was. While a guest moves the latter stands still,
; as its time stamp counter may, so KVM tells of a later boot afterwards; the sum of both goes on. After a move between
; two hosts it is as right as their clocks agree.
;
; A real-mode guest, because the MSRs may be written at level 0 only. It prints by the BIOS.

    bits 16
    org 0x7c00

THRESHOLD   equ 0               ; in the parameters' segment
PARAMETERS  equ 0x9f00
WALL_CLOCK  equ 0x4b564d00      ; MSR_KVM_WALL_CLOCK_NEW
SYSTEM_TIME equ 0x4b564d01      ; MSR_KVM_SYSTEM_TIME_NEW

; struct pvclock_wall_clock
W_SECONDS   equ boot + 4
W_NANOS     equ boot + 8
; struct pvclock_vcpu_time_info
T_VERSION   equ clock
T_TSC       equ clock + 8
T_TIME      equ clock + 16      ; nanoseconds at that TSC
T_MULTIPLY  equ clock + 24      ; nanoseconds = (cycles shifted) * this >> 32
T_SHIFT     equ clock + 28      ; by so many bits to the left, or to the right where it is negative

start:
    xor ax, ax
    mov ds, ax
    mov ecx, SYSTEM_TIME
    xor edx, edx
    mov eax, clock + 1          ; bit 0 switches it on
    wrmsr
    call look
    mov [last], eax
    mov [last + 4], edx
    mov [second], eax
    mov [second + 4], edx

beat:
    call look
    mov ecx, eax
    mov ebx, edx
    sub ecx, [last]
    sbb ebx, [last + 4]
    mov [last], eax
    mov [last + 4], edx
    js beat                     ; a clock that was set back tells nothing
    mov eax, ecx                ; the gap, in units of 0.1 ms
    mov edx, ebx
    mov ebx, 100000
    cmp edx, ebx
    jae beat                    ; more than five days: it was set
    div ebx
    push PARAMETERS
    pop es
    imul ecx, [es:THRESHOLD], 10
    cmp eax, ecx
    jb no_blackout
    mov si, text_blackout
    call print
    call print_tenths
    mov si, text_ms
    call print
no_blackout:
    mov eax, [last]
    mov edx, [last + 4]
    sub eax, [second]
    sbb edx, [second + 4]
    jnz a_second
    cmp eax, 1000000000
    jb beat
a_second:
    mov eax, [last]
    mov edx, [last + 4]
    mov [second], eax
    mov [second + 4], edx
    mov al, '.'
    call print_char
    jmp beat

; edx:eax = nanoseconds since 1970
look:
    mov ecx, WALL_CLOCK
    xor edx, edx
    mov eax, boot
    wrmsr
.again:
    mov ebp, [T_VERSION]
    test ebp, 1
    jnz .again
    rdtsc
    sub eax, [T_TSC]
    sbb edx, [T_TSC + 4]
    mov cl, [T_SHIFT]
    test cl, cl
    js .right
    shld edx, eax, cl
    shl eax, cl
    jmp .shifted
.right:
    neg cl
    shrd eax, edx, cl
    shr edx, cl
.shifted:
    mov ebx, edx                ; ebx:eax * T_MULTIPLY >> 32
    mul dword [T_MULTIPLY]
    mov esi, edx
    mov eax, ebx
    mul dword [T_MULTIPLY]
    add eax, esi
    adc edx, 0
    add eax, [T_TIME]
    adc edx, [T_TIME + 4]
    cmp ebp, [T_VERSION]
    jne .again
    mov ebx, edx
    mov esi, eax
    mov eax, [W_SECONDS]
    mov ecx, 1000000000
    mul ecx
    add eax, [W_NANOS]
    adc edx, 0
    add eax, esi
    adc edx, ebx
    ret

; Print eax in tenths.
print_tenths:
    mov ecx, 10
    xor edx, edx
    div ecx
    push dx
    xor bx, bx
.more:
    xor edx, edx
    div ecx
    push dx
    inc bx
    test eax, eax
    jnz .more
.digits:
    pop ax
    add al, '0'
    call print_char
    dec bx
    jnz .digits
    mov al, '.'
    call print_char
    pop ax
    add al, '0'
print_char:
    mov ah, 0x0e
    push bx
    xor bx, bx
    int 0x10
    pop bx
    ret

; Print the text at si.
print:
    push eax
.next:
    lodsb
    test al, al
    jz .done
    call print_char
    jmp .next
.done:
    pop eax
    ret

text_blackout: db 13, 10, "blackout ", 0
text_ms:       db " ms", 13, 10, 0

align 8
last:   dq 0
second: dq 0
boot:   times 3 dd 0
align 64
clock:  times 32 db 0
